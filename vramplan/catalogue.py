"""Finding the model a user means: a shipped profile, a folder, a config.json or a hub id."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from vramplan.config import MAX_PARAMETERS, ConfigReader, load_json
from vramplan.errors import ConfigError, EnvironmentProblem, UnknownNameError
from vramplan.families import find_family
from vramplan.model import Architecture, Dims, Model, ParameterSpec
from vramplan.resources import profiles_dir


@cache
def model_slugs() -> tuple[str, ...]:
    """Names of the shipped model profiles."""
    folder = profiles_dir() / "models"
    return tuple(sorted(path.stem for path in folder.glob("*.json")))


def model_from_config(
    config: Mapping[str, Any],
    name: str,
    *,
    where: str | None = None,
    repository: str | None = None,
    revision: str | None = None,
) -> Model:
    """Build a Model from the values of a config.json.

    Args:
        config: The config's object.
        name: What the user called the model.
        where: How to name the config in errors; the name if omitted.
        repository: Hub repository it came from.
        revision: Commit it came from.

    Returns:
        The model with its dimensions, modules and parameter count.

    Raises:
        ConfigError: If a value is missing, of the wrong type, out of range or inconsistent.
        UnknownNameError: If no block program describes the family.
    """
    where = where or name
    reader = ConfigReader(config, where)
    if "model_type" not in config:
        raise ConfigError(f"{where}: model_type is missing; is this a transformers config.json?")
    family = find_family(reader.text("model_type", default=""))
    dims = family.read(reader)
    architecture = family.architecture(dims)
    num_parameters = architecture.num_parameters(dims)
    if num_parameters > MAX_PARAMETERS:
        raise ConfigError(
            f"{where}: describes {num_parameters:.1e} parameters; that cannot be meant"
        )
    return Model(
        name=name,
        family=family.model_type,
        dims=dims,
        architecture=architecture,
        num_parameters=num_parameters,
        repository=repository,
        revision=revision,
        config=config,
        warnings=(*reader.warnings, *_expert_warnings(architecture, dims, num_parameters)),
    )


def _expert_warnings(architecture: Architecture, dims: Dims, num_parameters: int) -> list[str]:
    """What LoRA and QLoRA do to fused experts, which few expect."""
    bare = sum(
        spec.num_parameters
        for kind in dims.kinds
        for spec in architecture.block_of(kind)
        if isinstance(spec, ParameterSpec)
    )
    found = []
    if 2 * bare > num_parameters:
        found.append(
            f"QLoRA leaves {bare / num_parameters:.0%} of this model unquantised: bitsandbytes "
            "converts linear layers only, and its experts are bare parameters. "
            "prepare_model_for_kbit_training even makes them fp32; --no-prepare-kbit does not."
        )
    if any(spec.targets for spec in architecture.parameters()):
        found.append(
            "Under all-linear peft adapts the experts too and folds the adapters into a copy of a "
            "layer's experts at every forward; --target-modules q_proj,k_proj,v_proj,o_proj does "
            "not."
        )
    return found


class FoundConfig(NamedTuple):
    """A config.json and where it came from.

    Attributes:
        name: What the user called the model.
        config: The config's object; untrusted.
        where: How to name it in errors.
        repository: Hub repository, if known.
        revision: Commit of the repository, if known.
    """

    name: str
    config: Mapping[str, Any]
    where: str
    repository: str | None = None
    revision: str | None = None


def load_shipped(slug: str) -> Model:
    """A shipped profile by its exact name."""
    return _model(_shipped_config(slug))


def _shipped_config(slug: str) -> FoundConfig:
    path = profiles_dir() / "models" / f"{slug}.json"
    profile = json.loads(path.read_text(encoding="utf-8"))
    return FoundConfig(slug, profile["config"], slug, profile["repository"], profile["revision"])


def _model(found: FoundConfig) -> Model:
    return model_from_config(
        found.config,
        found.name,
        where=found.where,
        repository=found.repository,
        revision=found.revision,
    )


def find_model(name: str) -> Model:
    """The model a user means, for a family that a block program describes.

    Args:
        name: As in ``find_config``.

    Returns:
        The model.

    Raises:
        UnknownNameError: If it is nowhere to be found, or of a family without a block program.
        ConfigError: If its config.json cannot be used.
        EnvironmentProblem: If a hub id is not cached and cannot be fetched.
    """
    return _model(find_config(name))


def find_config(name: str) -> FoundConfig:
    """The config of the model a user means, whatever its family.

    Args:
        name: A shipped profile (``gpt-j-6b``), a folder with a config.json, a config.json, or a
            hub id (``EleutherAI/gpt-j-6b``), of which only config.json is fetched.

    Returns:
        The config, as it was found.

    Raises:
        UnknownNameError: If it is none of these, naming the nearest profiles.
        ConfigError: If its config.json cannot be read.
        EnvironmentProblem: If a hub id is not cached and cannot be fetched.
    """
    slug = name.strip().lower()
    if slug in model_slugs():
        return _shipped_config(slug)
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
        return FoundConfig(name, load_json(path), str(path))
    if path.is_file() or path.suffix == ".json" or name.startswith((".", "/", "~")):
        return FoundConfig(name, load_json(path), str(path))
    for known in model_slugs():
        if load_profile_repository(known).lower() == slug:
            return _shipped_config(known)
    if name.count("/") == 1:
        return FoundConfig(name, fetch_config(name), name, repository=name)
    raise UnknownNameError(
        "model", name, model_slugs(), "A folder, a config.json or a hub id works too."
    )


@cache
def load_profile_repository(slug: str) -> str:
    """Hub repository of a shipped profile."""
    path = profiles_dir() / "models" / f"{slug}.json"
    return str(json.loads(path.read_text(encoding="utf-8"))["repository"])


def fetch_config(repository: str) -> dict[str, Any]:
    """Fetch config.json, and nothing else, of a hub repository (or take it from the cache).

    Args:
        repository: ``owner/name``.

    Raises:
        EnvironmentProblem: If it is neither cached nor reachable, or may not be read.
        ConfigError: If the repository does not exist or has no config.json.
    """
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - slow import, rarely needed
    from huggingface_hub.errors import (  # noqa: PLC0415
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are not news
    try:
        path = hf_hub_download(repository, "config.json", etag_timeout=10)
    except HFValidationError:
        raise ConfigError(f"{repository!r} is not a hub id; write owner/name") from None
    except GatedRepoError:
        raise EnvironmentProblem(
            f"{repository} is gated: accept its licence on the hub and set HF_TOKEN, "
            "or name a local config.json"
        ) from None
    except LocalEntryNotFoundError:
        raise EnvironmentProblem(
            f"{repository}: config.json is not in the local cache and the hub cannot be reached; "
            "go online once, or name a local config.json"
        ) from None
    except EntryNotFoundError:
        raise ConfigError(f"{repository} has no config.json; is it a transformers model?") from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"the hub has no model {repository!r} (or it is private: set HF_TOKEN)"
        ) from None
    except OSError as error:
        raise EnvironmentProblem(f"cannot fetch {repository}: {error}") from None
    return load_json(Path(path))
