from pathlib import Path

import pytest

from config.settings import AppSettings
from deployments.deploy_file import DeployFile, read_deploy_file
from gemma_serve.errors import ConfigurationError

ROOT = Path(__file__).parents[2]
SHIPPED = [ROOT / "serve_config.yaml", *sorted((ROOT / "config").glob("*.yaml"))]


def settings_of(file: DeployFile) -> AppSettings:
    (application,) = file.config.applications
    return file.settings[application.name]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_file_is_valid_and_open_to_this_machine_only(path: Path) -> None:
    file = read_deploy_file(path)
    settings_of(file)
    assert (file.config.http_options.host, file.config.http_options.port) == ("127.0.0.1", 8000)


def test_container_listens_to_what_docker_publishes() -> None:
    file = read_deploy_file(ROOT / "deploy/container.yaml")
    settings_of(file)
    assert (file.config.http_options.host, file.config.http_options.port) == ("0.0.0.0", 8000)


@pytest.mark.parametrize("name", ["serve_config", "config/demo-vision", "config/270m-cpu"])
def test_configurations_for_any_machine_fit_two_cores(name: str) -> None:
    settings = settings_of(read_deploy_file(ROOT / f"{name}.yaml"))
    assert settings.cpus_per_replica + settings.cpus_per_ingress_replica <= 2


def test_key_that_serve_would_ignore_is_named(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(
        "http_option: {host: 127.0.0.1}\n"
        "http_options: {prot: 8000}\n"
        "applications: [{import_path: 'serve_app:build_app', arg: {}}]\n"
    )
    with pytest.raises(ConfigurationError) as caught:
        read_deploy_file(path)
    assert str(caught.value).splitlines() == [
        "Serve cannot use this:",
        "  http_options.prot: Extra inputs are not permitted",
        "  applications.0.arg: Extra inputs are not permitted",
        "  http_option: Extra inputs are not permitted",
    ]


def test_mistake_under_args_is_found_before_ray_starts(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("applications: [{import_path: 'serve_app:build_app', args: {modle: demo}}]")
    with pytest.raises(ConfigurationError, match=r"modle: .* did you mean model\?"):
        read_deploy_file(path)


def test_application_of_somebody_else_beside_ours_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(
        "applications:\n"
        "  - {name: other, route_prefix: /other, import_path: 'their:app', args: {knob: 1}}\n"
        "  - {name: ours, import_path: 'serve_app:build_app', args: {model: 'dummy:1b'}}\n"
    )
    assert read_deploy_file(path).settings == {"ours": AppSettings(model="dummy:1b")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("applications: [", "is not valid YAML"),
        ("", "the file: Input should be a valid dictionary"),
        ("applications: []\nhttp_options: {port: http}", r"http_options.port: .* integer"),
    ],
)
def test_file_that_is_no_configuration_says_why(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match=message):
        read_deploy_file(path)


def test_missing_file_is_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        read_deploy_file(tmp_path / "absent.yaml")
