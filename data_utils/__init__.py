"""Preference data: from shards on disk to micro-batches. Knows neither `dpo` nor `torch.distributed`."""
