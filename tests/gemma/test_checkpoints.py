import json
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_serve.errors import CheckpointError, ConfigurationError
from gemma_serve.gemma.checkpoints import (
    DemoCheckpoint,
    DummyCheckpoint,
    FolderCheckpoint,
    GGUFCheckpoint,
    resolve,
    served_name,
)
from gemma_serve.gemma.config import ModelConfig


def make_folder(folder: Path, *, weights: bool = True, **config: object) -> Path:
    """A checkpoint as far as ``resolve`` looks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3_text", **config}))
    if weights:
        (folder / "model.safetensors").touch()
    return folder


def error_of(model: str | Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve(ModelConfig(model=str(model)))
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("demo", "gemma-3-270m-demo"),
        ("demo-vision", "gemma-3-270m-demo-vision"),
        ("dummy:4b", "gemma-3-4b-dummy"),
        ("google/gemma-3-4b-it", "google/gemma-3-4b-it"),
        ("/srv/models/my-gemma", "my-gemma"),
        ("/srv/models/my-gemma/", "my-gemma"),
        ("./my-gemma", "my-gemma"),
        ("~/my-gemma", "my-gemma"),
        ("/srv/models/gemma-3-1b-it-Q8_0.gguf", "gemma-3-1b-it-Q8_0"),
        ("models/gemma-3-1b-it-Q8_0.gguf", "gemma-3-1b-it-Q8_0"),
    ],
)
def test_served_name_is_no_path_of_the_machine(model: str, name: str) -> None:
    assert served_name(model) == name


def test_importing_checkpoints_leaves_torch_and_transformers_out() -> None:
    code = "import sys, gemma_serve.gemma.checkpoints; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert {"torch", "transformers"}.isdisjoint(modules)


def test_short_names_resolve_to_their_kind() -> None:
    assert resolve(ModelConfig(model="demo")) == DemoCheckpoint(vision=False)
    assert resolve(ModelConfig(model="demo-vision")) == DemoCheckpoint(vision=True)
    assert resolve(ModelConfig(model="dummy:27b")) == DummyCheckpoint("27b")


def test_folder_resolves_to_itself(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    assert resolve(ModelConfig(model=str(folder))) == FolderCheckpoint(folder)


def test_gguf_file_resolves_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "gemma.gguf"
    path.touch()
    assert resolve(ModelConfig(model=str(path))) == GGUFCheckpoint(path)


def test_missing_gguf_file_is_named() -> None:
    assert error_of("/nowhere/x.gguf") == "model: there is no file /nowhere/x.gguf"


def test_hub_id_is_downloaded_at_its_revision(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    asked = []

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo_id, revision, allow_patterns))
        return str(folder)

    config = ModelConfig(model="google/gemma-3-1b-it", revision="v1")
    assert resolve(config, download=download) == FolderCheckpoint(folder)
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model"]
    assert asked == [("google/gemma-3-1b-it", "v1", patterns)]


@pytest.mark.parametrize("model", ["demo", "dummy:1b", "{tmp_path}", "{tmp_path}/x.gguf"])
def test_revision_of_anything_but_a_hub_id_is_refused(tmp_path: Path, model: str) -> None:
    make_folder(tmp_path)
    (tmp_path / "x.gguf").touch()
    model = model.format(tmp_path=tmp_path)
    with pytest.raises(ConfigurationError) as caught:
        resolve(ModelConfig(model=model, revision="v1"))
    assert str(caught.value).startswith(f"revision: 'v1' is for a Hub id only, and model {model} ")


def test_misspelt_short_name_gets_a_suggestion() -> None:
    assert "did you mean 'demo-vision'?" in error_of("demo-visio")
    assert "did you mean 'demo'?" in error_of("Demo")


def test_unknown_short_name_lists_what_there_is() -> None:
    message = error_of("llama")
    assert message.startswith("model: 'llama' is not known: It must be one of demo, demo-vision, ")
    assert "a Hub id such as google/gemma-3-4b-it" in message


def test_unknown_dummy_size_lists_the_sizes() -> None:
    assert error_of("dummy:7b") == (
        "model: 'dummy:7b' is not one of dummy:270m, dummy:1b, dummy:4b, dummy:12b, dummy:27b"
    )


def test_missing_folder_is_not_taken_for_a_hub_id() -> None:
    message = error_of("/nowhere/gemma")
    assert message == "model: there is no folder /nowhere/gemma, and it is not a Hub id"


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert error_of(tmp_path) == f"model: {tmp_path} is not a checkpoint: it has no config.json"


def test_unreadable_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert "config.json of" in error_of(tmp_path)


def test_other_architecture_is_refused(tmp_path: Path) -> None:
    message = error_of(make_folder(tmp_path, model_type="gemma3n"))
    assert "is not a Gemma 3: its config.json has model_type 'gemma3n'" in message


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert "has no model.safetensors" in error_of(make_folder(tmp_path, weights=False))


def test_missing_shards_are_counted(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, weights=False)
    shards = {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "1.safetensors").touch()
    assert "lacks 1 of 2 weight files (2.safetensors" in error_of(folder)
