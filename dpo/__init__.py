"""Direct Preference Optimization: scoring, losses, references and the engines that shard them."""
