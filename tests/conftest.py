"""For all tests: no deadline per example of a property test. On a busy machine it fails, and says nothing on the code."""

from hypothesis import settings

settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
