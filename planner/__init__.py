"""TorchRec planner components that know the tiers below memory."""

from .. import errors as _errors  # noqa: F401  (relative: a top-level `import planner` fails at once)
