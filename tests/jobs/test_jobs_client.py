"""Reaching a cluster: addresses, silent and foreign servers, certificates."""

from __future__ import annotations

import functools
import http.server
import socket
import threading
from pathlib import Path

import pytest

from rairl_ray.jobs import client
from rairl_ray.jobs.client import ClusterError, Connection, api_address, certificates, reachable
from tests.tls_front import tls_front


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ftp://host", "scheme ftp:// is not supported"),
        ("ray://host:10001", "scheme ray:// is not supported"),
        ("host:6379", "port 6379 is where nodes join"),
        ("http://user:pw@host", "holds a user or password"),
        ("http://", "names no host"),
        ("http://host:x", "is no address"),
    ],
)
def test_a_wrong_address_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ClusterError, match=message) as caught:
        api_address(text)
    assert "pw" not in str(caught.value)


def test_an_address_given_wins_over_rays_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:8265")
    assert api_address(None) == "http://elsewhere:8265"
    assert api_address("https://given/") == "https://given"
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path))
    assert certificates(None) == str(tmp_path)
    with pytest.raises(ClusterError, match="no such file"):
        certificates("/nowhere/ca.pem")


def test_a_closed_port_is_one_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ClusterError, match="nobody answers there"):
            reachable(f"http://127.0.0.1:{free.getsockname()[1]}")


def test_a_server_that_is_not_rays_and_a_silent_one_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "api").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(ClusterError, match="Version check returned 404"):
            Connection(address)
        (tmp_path / "api/version").write_text("<html>hello</html>")
        with pytest.raises(ClusterError, match="no answer of Ray's Jobs API; is it Ray's dashboard"):
            Connection(address)
        server.shutdown()
    monkeypatch.setattr(client, "VERSION_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(ClusterError, match="no answer in time") as caught:
            Connection(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert len(str(caught.value).splitlines()) == 1


def test_a_certificate_is_checked_against_the_named_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "api").mkdir()
    (tmp_path / "api/version").write_text('{"version": "4", "ray_version": "2.60.0"}')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with tls_front(server.server_address[1], tmp_path) as (address, certificate):
            with pytest.raises(ClusterError, match=r"a certificate that is not trusted; .* --ca-file FILE"):
                Connection(address)
            assert Connection(address, str(certificate)).options().endswith(f"--ca-file {certificate}")
            monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
            Connection(address)
        server.shutdown()
