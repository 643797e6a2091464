"""For all tests: no deadline per example of a property test: on a busy machine it fails, whatever the code."""

from hypothesis import settings

settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
