"""Every error Silkscreen raises. Each message says what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence


class SilkscreenError(Exception):
    """The root of all errors of this library."""


class ManifestError(SilkscreenError):
    """A `template.toml` or `base.toml` does not say what it has to."""


class UnknownNameError(SilkscreenError):
    """No template, base, input or option goes by a name."""


class UnavailableError(SilkscreenError):
    """Something is installed but cannot be used: in conflict, incompatible, blocked or invalid."""


class UntrustedCodeError(SilkscreenError):
    """A folder with code was named, and nobody has said that its code may run."""


class ContractError(SilkscreenError):
    """A template module breaks the contract.

    Attributes:
        violations: every violation found, one sentence each.
    """

    def __init__(self, template: str, violations: Sequence[str]) -> None:
        self.violations = list(violations)
        listed = "\n".join(f"  - {violation}" for violation in self.violations)
        super().__init__(f"template {template!r} cannot be used:\n{listed}")


class WeightsError(SilkscreenError):
    """Weights cannot be found or read, or are not those of the model."""


class HubError(WeightsError):
    """Something cannot be had from a hub, or sent to it; the classes derived from it tell why."""


class NoSuchRepositoryError(HubError):
    """A hub has no repository of a name, or none that may be seen."""


class NoSuchRevisionError(HubError):
    """A repository has no branch, tag or commit of a name."""


class NoSuchFileError(HubError):
    """A repository has no file or folder of a name."""


class PermissionDeniedError(HubError):
    """A hub does not let a repository be read or written."""


class NetworkError(HubError):
    """A hub cannot be reached, or the connection broke again and again."""


class HubTimeoutError(NetworkError):
    """A hub stopped answering."""


class OfflineError(HubError):
    """Something is not on this disk, and the network may not be asked."""


class DiskFullError(HubError):
    """There is no room for what is fetched."""


class ChecksumError(HubError):
    """What came is not what the hub says the file is."""


class InputError(SilkscreenError):
    """A template input is missing, unknown, of the wrong type or out of range."""


class CacheError(SilkscreenError):
    """A template cache does not fit the base, or several do not fit together."""


class RecipeError(SilkscreenError):
    """A recipe cannot be read or followed."""


class PipelineError(SilkscreenError):
    """A pipeline cannot be driven by templates."""


class BaseError(SilkscreenError):
    """A base cannot be loaded."""


class TrainingError(SilkscreenError):
    """Training cannot start or go on."""


class ProjectError(SilkscreenError):
    """A plugin's project folder cannot be found, read or made."""


class PackError(SilkscreenError):
    """A template cannot be packed into a wheel, or the wheel does not hold what it should."""


class PublishError(SilkscreenError):
    """A template cannot be published as it is."""
