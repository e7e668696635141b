"""The set-up looks for packages where pip is told to."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "install.py"


def install():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_pip_is_told_uv_is_told(tmp_path):
    (tmp_path / "simple").mkdir()
    configured = f"""
:env:.cert='/etc/certificates.crt'
:env:.quiet='1'
global.index-url='https://packages.example/simple'
global.extra-index-url='file://{tmp_path}/simple file://{tmp_path}/gone https://more.example/simple'
global.find-links='{tmp_path}/wheels https://wheels.example/'
install.constraint='{tmp_path}/constraints.txt'
"""
    assert install().environment(configured) == {
        "SSL_CERT_FILE": "/etc/certificates.crt",
        "UV_DEFAULT_INDEX": "https://packages.example/simple",
        "UV_EXTRA_INDEX_URL": f"file://{tmp_path}/simple https://more.example/simple",
        "UV_FIND_LINKS": f"{tmp_path}/wheels,https://wheels.example/",
        "UV_CONSTRAINT": f"{tmp_path}/constraints.txt",
    }


def test_pip_goes_on_where_uv_fails(monkeypatch, capsys):
    module, ran = install(), []

    def run(command, **_):
        ran.append(command)
        return type("Done", (), {"returncode": int("uv" in command), "stdout": ""})

    monkeypatch.setattr(module.subprocess, "run", run)
    assert module.main() == 0
    assert [next(word for word in command if word in ("config", "uv", "pip")) for command in ran[2:]] == ["uv", "pip"]
    assert ran[-1][-4:] == module.PROJECTS and "takes longer" in capsys.readouterr().err
