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
    assert file.addresses == {("127.0.0.1", 8000)}
    assert file.base_url("gemma") == "http://127.0.0.1:8000/v1"


def test_container_listens_to_what_docker_publishes() -> None:
    settings = settings_of(read_deploy_file(ROOT / "deploy/container.yaml"))
    assert (settings.host, settings.port) == ("0.0.0.0", 8000)


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


def file_of_ours(tmp_path: Path, top: str = "", args: str = "", route_prefix: str = "/") -> Path:
    path = tmp_path / "serve.yaml"
    path.write_text(
        f"{top}\napplications: [{{name: ours, route_prefix: {route_prefix}, "
        f"import_path: 'serve_app:build_app', args: {{{args}}}}}]"
    )
    return path


def test_addresses_are_those_of_whoever_listens(tmp_path: Path) -> None:
    proxies = "http_options: {host: 0.0.0.0, port: 81}"
    proxied = read_deploy_file(file_of_ours(tmp_path, proxies, route_prefix="/chat"))
    assert proxied.addresses == {("0.0.0.0", 81)}
    assert proxied.base_url("ours") == "http://127.0.0.1:81/chat/v1"
    listening = read_deploy_file(file_of_ours(tmp_path, proxies, "host: '::', port: 82"))
    assert listening.addresses == {("::", 82)}
    assert listening.base_url("ours") == "http://127.0.0.1:82/v1"


def test_two_applications_at_one_port_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(
        "applications:\n"
        "  - {name: a, route_prefix: /a, import_path: 'serve_app:build_app', args: {port: 81}}\n"
        "  - {name: b, route_prefix: /b, import_path: 'serve_app:build_app', args: {port: 81}}\n"
    )
    with pytest.raises(ConfigurationError, match="b: a listens at port 81 too"):
        read_deploy_file(path)


def test_port_that_serves_proxies_have_too_is_refused(tmp_path: Path) -> None:
    """They would share it, and each connection would go to the one or the other."""
    with pytest.raises(ConfigurationError, match="ours: Serve's proxies listen at port 8000 too"):
        read_deploy_file(file_of_ours(tmp_path, args="port: 8000"))
    without = file_of_ours(tmp_path, "proxy_location: Disabled", "port: 8000")
    assert read_deploy_file(without).settings["ours"].port == 8000


def test_application_that_nobody_can_reach_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="ours: nobody listens; set a port"):
        read_deploy_file(file_of_ours(tmp_path, "proxy_location: Disabled"))


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
