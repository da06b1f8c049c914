"""A generator that comes from the Hugging Face Hub, or goes there.

The files are those of `fastnce export --format safetensors`. No file that is downloaded is run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..export import Source, open_source, write_safetensors
from ..export.card import edited_card, is_untouched, read_card
from ..translate import Translator
from ..translate.exported import CARD, CONFIG, WEIGHTS, is_exported
from ..translate.named import locate
from .mixin import check_name, mixed, one_sentence, reading_config


class HubModel:
    """A trained generator with `from_pretrained`, `save_pretrained` and `push_to_hub`.

    They go through `huggingface_hub.ModelHubMixin`. A model translates images of any size, as
    `fastnce.translate.Translator` does.

    Args:
        source: as `fastnce.export.open_source` returns.
        card: the text of README.md, as its user has edited it; empty: it is written anew.
        device: where it translates.
    """

    def __init__(self, source: Source, card: str = "", device: str | torch.device = "cpu"):
        self.source, self.card = source, card
        self.translator = Translator(source.network, device)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        generator: str = "",
        *,
        trust_code: bool = False,
        device: str | torch.device = "cpu",
    ) -> HubModel:
        """Load a run, a checkpoint, an exported folder (with its README.md), a published file or a shipped model.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        path = locate(path)
        return cls(open_source(path, generator, trust_code), edited_card(path), device)

    @classmethod
    def from_pretrained(
        cls,
        where: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        device: str | torch.device = "cpu",
    ) -> HubModel:
        """Load a model from the hub, or from a folder that `save_pretrained` or `fastnce export` wrote.

        Args:
            where: "USER/NAME", or the path of a folder; a folder that exists comes first.
            revision: a branch, a tag or a commit of the hub; default: the newest commit.
            token: of a private model; default: the one that `hf auth login` has stored.
            cache_dir: folder for what is downloaded; default: the library's own.
            force_download: download again what is there already.
            local_files_only: download nothing.
            device: where it translates. Weights of 16 bits are computed in float32 on every device.

        Raises:
            ValueError: huggingface_hub is absent; the hub cannot be reached or has no such model; or the files are no
                export of a generator, are damaged, or are of a newer version.
        """
        if os.path.isdir(where):
            if not is_exported(Path(where)):
                raise ValueError(f"{where} is no exported model: it has no {CONFIG} (HubModel.open takes a run)")
            return cls.open(where, device=device)
        name = os.fspath(where)
        check_name(name)
        with one_sentence(f"{name} cannot be loaded"), reading_config(name):
            found = mixed().from_pretrained(
                name,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        return cls.open(found.folder, device=device)

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: str = "") -> list[Path]:
        """Write model.safetensors, config.json and README.md; return their paths.

        Args:
            dtype: of the weights: "float32", "float16" or "bfloat16"; empty: as they were stored.

        Raises:
            ValueError, OSError: as `fastnce.export.write_safetensors`.
        """
        return write_safetensors(self.source, Path(folder), dtype or self.source.dtype, self.card)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        commit_message: str = "Model of fastnce",
        dtype: str = "",
    ) -> str:
        """Upload the files of `save_pretrained` in one commit; the repository is created if there is none.

        A README.md that was edited on the hub is kept, unless this model came from a folder with an edited one.

        Args:
            repo_id: "USER/NAME".
            private: whether a new repository is private; default: public, unless the organisation says otherwise.
            token: with the right to write; default: the one that `hf auth login` has stored.
            branch: of the repository; default: "main".
            commit_message: of the commit.
            dtype: see `save_pretrained`.

        Returns:
            the address of the commit.

        Raises:
            ValueError: huggingface_hub is absent, the hub refuses or cannot be reached, or the model cannot be written.
        """
        check_name(repo_id)
        with one_sentence(f"{repo_id} cannot be written"):
            carrier = mixed()()
            carrier.save = lambda folder: self.save_pretrained(folder, dtype)
            kept = None if self.card or not _keeps_card(repo_id, token, branch) else [CARD]
            return str(
                carrier.push_to_hub(
                    repo_id,
                    private=private,
                    token=token,
                    branch=branch,
                    commit_message=commit_message,
                    allow_patterns=[WEIGHTS, CONFIG, CARD],
                    ignore_patterns=kept,
                )
            )

    def translate(self, picture: Any) -> Any:
        """See `fastnce.translate.Translator.translate`."""
        return self.translator.translate(picture)

    def __call__(self, pictures: Tensor) -> Tensor:
        """See `fastnce.translate.Translator.__call__`."""
        return self.translator(pictures)

    def __repr__(self) -> str:
        return f"HubModel({self.source.name}, {self.translator!r})"


def push(
    path: str | os.PathLike[str],
    repo_id: str,
    *,
    generator: str = "",
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    dtype: str = "",
    trust_code: bool = False,
) -> str:
    """Upload the generator of a run, a checkpoint, an exported folder or a published `.pth` file.

    Args:
        path, generator, trust_code: as `fastnce.export.open_source` takes them.
        repo_id, private, token, branch, dtype: see `HubModel.push_to_hub`.

    Returns:
        the address of the commit.

    Raises:
        ValueError: as `HubModel.open` and `HubModel.push_to_hub`.
    """
    check_name(repo_id)
    model = HubModel.open(path, generator, trust_code=trust_code)
    return model.push_to_hub(repo_id, private=private, token=token, branch=branch, dtype=dtype)


def _keeps_card(repo_id: str, token: str | None, branch: str | None) -> bool:
    """Whether the hub has a README.md that somebody has edited."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    if not api.file_exists(repo_id, CARD, revision=branch):
        return False
    return not is_untouched(read_card(Path(api.hf_hub_download(repo_id, CARD, revision=branch))))
