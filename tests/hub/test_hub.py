"""`HubModel` and `fastnce push`: what is asked of the hub, through a stand-in that keeps what is uploaded."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastnce.commands.main import main
from fastnce.export import open_source, write_safetensors
from fastnce.hub import HubModel, mixin, push
from tests.ends import one_sentence
from tests.export.test_folder import content, made

library = pytest.importorskip("huggingface_hub", reason="huggingface_hub (extra hub) is not installed")
FILES = {"README.md", "config.json", "model.safetensors"}


class Hub:
    """Stands in for the hub: models by name, each a folder of files; and the calls that were made."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, bytes]] = {}
        self.created: list[tuple[str, bool | None]] = []
        self.commits: list[dict] = []
        self.asked: list[dict] = []
        self.tokens: set[object] = set()
        self.error: Exception | None = None
        self.cache = Path()

    def api(self, token=None):
        self.tokens.add(token)
        return self

    def create_repo(self, repo_id, private=None, exist_ok=False):
        if self.error:
            raise self.error
        assert exist_ok
        self.models.setdefault(repo_id, {})
        self.created.append((repo_id, private))
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, repo_id, filename, *, revision=None):
        if self.error:
            raise self.error
        return filename in self.models.get(repo_id, {})

    def upload_folder(self, *, repo_id, folder_path, repo_type, allow_patterns, ignore_patterns, **others):
        files = {p.relative_to(folder_path).as_posix(): p.read_bytes() for p in Path(folder_path).rglob("*")}
        chosen = {
            path: data for path, data in files.items() if path in allow_patterns and path not in (ignore_patterns or [])
        }
        assert repo_type == "model"
        self.models[repo_id] |= chosen
        self.commits.append({"repo_id": repo_id, "files": set(chosen), **others})
        return f"https://hub.example/{repo_id}/commit/{len(self.commits)}"

    def folder(self, repo_id: str, place: Path) -> Path:
        place.mkdir(parents=True, exist_ok=True)
        for name, data in self.models[repo_id].items():
            (place / name).write_bytes(data)
        return place

    def hf_hub_download(self, repo_id, filename, cache_dir=None, **asked):
        if self.error:
            raise self.error
        self.asked.append({"file": filename, **asked})
        return str(self.folder(repo_id, Path(cache_dir or self.cache)) / filename)

    def snapshot_download(self, repo_id, *, cache_dir, **asked):
        self.asked.append(asked)
        return str(self.folder(repo_id, Path(cache_dir)))


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Hub:
    stand_in = Hub()
    stand_in.cache = tmp_path / "downloaded"
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", stand_in.api)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", stand_in.hf_hub_download)
    monkeypatch.setattr(library, "HfApi", stand_in.api, raising=False)
    monkeypatch.setattr(library, "snapshot_download", stand_in.snapshot_download, raising=False)
    mixin.mixed.cache_clear()
    yield stand_in
    mixin.mixed.cache_clear()


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    write_safetensors(made(method="cut"), folder)
    return folder


def test_there_and_back(hub, exported, tmp_path):
    address = push(exported, "ann/zebras", private=True, token="secret")
    assert address == "https://hub.example/ann/zebras/commit/1"
    assert hub.created == [("ann/zebras", True)]
    assert hub.tokens == {"secret"}
    assert hub.commits[0]["files"] == FILES
    assert hub.models["ann/zebras"] == content(exported)
    model = HubModel.from_pretrained("ann/zebras", revision="v1", token="t", cache_dir=tmp_path / "cache")
    x = torch.rand(1, 3, 9, 14) * 2 - 1
    assert torch.equal(model(x), HubModel.open(exported)(x))
    assert model.translate(torch.zeros(3, 9, 14, dtype=torch.uint8)).shape == (3, 9, 14)
    for asked in hub.asked:
        assert (asked["revision"], asked["token"], asked["local_files_only"]) == ("v1", "t", False)
    assert set(hub.asked[-1]["allow_patterns"]) == FILES  # nothing else, such as code, is downloaded


def test_the_class_has_the_mixin_of_the_library():
    assert issubclass(mixin.mixed(), library.ModelHubMixin)


def test_a_folder_needs_no_hub(exported, tmp_path, monkeypatch):
    monkeypatch.setattr("fastnce.hub.model.mixed", None)
    model = HubModel.from_pretrained(exported)
    assert sorted(path.name for path in model.save_pretrained(tmp_path / "again")) == sorted(FILES)
    assert content(tmp_path / "again") == content(exported)
    model.save_pretrained(tmp_path / "half", dtype="float16")
    assert open_source(tmp_path / "half").dtype == "float16"
    with pytest.raises(ValueError, match=r"is no exported model: it has no config\.json"):
        HubModel.from_pretrained(tmp_path)


def test_a_licence_that_was_filled_is_kept(hub, exported, tmp_path):
    """In the folder, which is then uploaded; and on the hub, where a run is pushed once more. Others are replaced."""
    folder = tmp_path / "mine"
    write_safetensors(made(method="cut"), folder)
    text = (folder / "README.md").read_text().replace("license: unknown", "license: mit")
    (folder / "README.md").write_text(text)
    push(folder, "ann/zebras")
    assert b"license: mit" in hub.models["ann/zebras"]["README.md"]
    HubModel(made(3)).push_to_hub("ann/zebras")  # as of a run: without a README.md of its own
    assert hub.commits[-1]["files"] == FILES - {"README.md"}
    assert b"license: mit" in hub.models["ann/zebras"]["README.md"]
    model = HubModel.from_pretrained("ann/zebras", cache_dir=tmp_path / "cache")
    assert model.source.options["width"] == 3
    push(exported, "ann/lions", branch="old")
    assert hub.commits[-1]["revision"] == "old"
    first = hub.models["ann/lions"]["README.md"]
    HubModel(made(3)).push_to_hub("ann/lions")
    assert hub.commits[-1]["files"] == FILES
    assert b"width 3" in hub.models["ann/lions"]["README.md"] != first


def test_the_command(hub, exported, tmp_path, capsys):
    assert main(["push", str(exported), "ann/zebras", "--private", "--dtype", "bfloat16", "--generator", "G"]) == 0
    assert capsys.readouterr().out == "https://hub.example/ann/zebras/commit/1\n"
    assert hub.created == [("ann/zebras", True)]
    assert open_source(hub.folder("ann/zebras", tmp_path / "down")).dtype == "bfloat16"
    assert main(["push", str(exported), "ann/lions"]) == 0
    assert hub.created[-1] == ("ann/lions", None)


def test_mistakes_are_one_sentence_and_reach_no_hub(hub, exported, tmp_path, capsys):
    hub.error = AssertionError("the hub was asked")
    for words, wanted in (
        (["push", exported, "zebras"], "'zebras' is neither a folder nor the name of a model on the hub"),
        (["push", exported, "a/b/c"], "such as USER/NAME"),
        (["push", exported, "../b"], "such as USER/NAME"),
        (["push", tmp_path, "a/b"], "no checkpoint here"),
        (["push", exported, "a/b", "--generator", "G_B"], "holds the generator G, and no 'G_B'"),
    ):
        assert main([str(word) for word in words]) == 2
        assert wanted in one_sentence(capsys)
    with pytest.raises(ValueError, match="'no/such/folder' is neither a folder nor the name of a model"):
        HubModel.from_pretrained("no/such/folder")


def answer(code: int):
    """The hub's answer to a request, as the library raises it."""
    response = SimpleNamespace(headers={}, status_code=code, request=None)
    return library.errors.HfHubHTTPError(f"{code} Client Error.\n\nYou may not.", response=response)


def unreachable() -> Exception:
    """An error of the package that huggingface_hub sends its requests with: httpx, httpx2 or requests."""
    kinds = library.errors.HfHubHTTPError.__mro__[1:]
    package = next(kind.__module__ for kind in kinds if not kind.__module__.startswith("huggingface_hub"))
    transport = sys.modules[package.partition(".")[0]]
    kind = getattr(transport, "ConnectError", None) or transport.ConnectionError
    return kind("no such host")


ERRORS = {
    "refused": (lambda: answer(403), "403 Client Error. You may not."),
    "offline": (lambda: library.errors.OfflineModeIsEnabled("no\nnetwork"), "no network"),
    "not cached": (lambda: library.errors.LocalEntryNotFoundError("not on the disk"), "not on the disk"),
    "no token": (lambda: library.errors.LocalTokenNotFoundError("run `hf auth login`"), "run `hf auth login`"),
    "no connection": (lambda: ConnectionError("refused"), "refused"),
    "no answer": (lambda: pytest.importorskip("httpx").ConnectTimeout("too slow"), "too slow"),
    "no host": (unreachable, "no such host"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_the_hub_are_one_sentence(name, hub, exported, tmp_path, capsys):
    make, wanted = ERRORS[name]
    hub.error = make()
    assert main(["push", str(exported), "ann/zebras"]) == 2
    assert f"fastnce: ann/zebras cannot be written: {wanted}\n" == one_sentence(capsys)
    if name != "refused":  # after an answer, the library goes on without config.json
        with pytest.raises(ValueError, match=f"ann/zebras cannot be loaded: {wanted}"):
            HubModel.from_pretrained("ann/zebras", cache_dir=tmp_path)


def test_an_error_of_our_own_is_not_the_hubs(hub, exported):
    hub.error = ZeroDivisionError("ours")
    with pytest.raises(ZeroDivisionError, match="ours"):
        push(exported, "ann/zebras")


@pytest.mark.parametrize("damage", [b"{", b"[]", b"\xff", b'{"a": 1}'], ids=["cut", "a list", "no text", "another"])
def test_a_damaged_config_on_the_hub(damage, hub, exported, tmp_path):
    push(exported, "ann/zebras")
    hub.models["ann/zebras"]["config.json"] = damage
    with pytest.raises(ValueError, match=r"config\.json (is no table in JSON|was not written by fastnce export)"):
        HubModel.from_pretrained("ann/zebras", cache_dir=tmp_path)


def test_without_the_library(exported, monkeypatch, capsys):
    mixin.mixed.cache_clear()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["push", str(exported), "ann/zebras"]) == 2
    assert "which is not installed: pip install huggingface_hub" in one_sentence(capsys)
    assert HubModel.from_pretrained(exported).source.name == "G"
