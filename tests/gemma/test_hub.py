from collections.abc import Callable

import httpx2
import pytest
from huggingface_hub import errors

from gemma_serve.errors import CheckpointError
from gemma_serve.gemma.hub import fetch

REPO = "google/gemma-3-4b-it"
RESPONSE = httpx2.Response(404, request=httpx2.Request("GET", f"https://huggingface.co/{REPO}"))


def message_for(error: Exception, revision: str | None = None) -> str:
    """What an operator reads when the download fails with ``error``."""
    with pytest.raises(CheckpointError) as caught:
        fetch(REPO, revision, failing_with(error))
    assert caught.value.__cause__ is error
    return str(caught.value)


def failing_with(error: Exception) -> Callable[..., str]:
    def download(*_args: object, **_options: object) -> str:
        raise error

    return download


def test_gated_model_says_where_to_accept_the_licence() -> None:
    message = message_for(errors.GatedRepoError("403", response=RESPONSE))
    page = "https://huggingface.co/google/gemma-3-4b-it"
    assert message == (
        f"model: {REPO} is gated: accept its licence at {page} and set HF_TOKEN to a token of "
        "the account that did"
    )


def test_missing_repository_may_be_private() -> None:
    message = message_for(errors.RepositoryNotFoundError("404", response=RESPONSE))
    assert f"{REPO} does not exist, or is private" in message
    assert "HF_TOKEN" in message


def test_missing_revision_is_named() -> None:
    message = message_for(errors.RevisionNotFoundError("404", response=RESPONSE), "v9")
    assert f"{REPO} has no revision 'v9'" in message


@pytest.mark.parametrize(
    "error",
    [
        errors.LocalEntryNotFoundError("no snapshot"),
        errors.OfflineModeIsEnabled("offline"),
        ConnectionError("refused"),
    ],
)
def test_no_network_names_ways_out(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    message = message_for(error)
    assert "the Hub cannot be reached: check the network" in message
    assert f"hf download {REPO}" in message


def test_forbidden_network_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = message_for(errors.LocalEntryNotFoundError("no snapshot"))
    assert "HF_HUB_OFFLINE forbids the network: unset it" in message


@pytest.mark.parametrize(
    "error",
    [
        errors.HfHubHTTPError("500 Server Error", response=RESPONSE),
        errors.HFValidationError("bad id"),
        OSError("No space left on device"),
    ],
)
def test_any_other_failure_is_passed_on(error: Exception) -> None:
    assert message_for(error) == f"model: {REPO} could not be fetched: {error}"
