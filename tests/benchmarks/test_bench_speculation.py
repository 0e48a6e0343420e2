import json
from pathlib import Path

import pytest

from benchmarks.bench_speculation import main
from tests.tiny import save_tiny_checkpoint


@pytest.mark.parametrize("has_draft_model", [False, True])
def test_both_texts_are_decoded_with_drafts_and_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], has_draft_model: bool
) -> None:
    checkpoint = save_tiny_checkpoint(tmp_path / "tiny")
    arguments = ["--model", str(checkpoint), "--concurrency", "2", "--max-tokens", "6"]
    arguments += ["--rounds", "1", "--threads", "1", "--json", str(tmp_path / "results.json")]
    if has_draft_model:
        arguments += ["--draft-model", str(save_tiny_checkpoint(tmp_path / "draft", seed=1))]
    main([*arguments, "--texts", "repeating"])
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert (result["text"], result["concurrency"], result["num_texts"]) == ("repeating", 2, 2)
    assert result["ratio"] > 0
    assert "repeating" in capsys.readouterr().out
