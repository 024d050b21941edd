"""What stands in the network: taken from the cache where it is there, and one line says what to fetch where it is not.

    tokenizer = tokenizer_of("ViT-H-14-CLIPA", model_config("ViT-H-14-CLIPA"))
    with offline(): ...                 # Hugging Face's libraries use their cache alone

Without a network those libraries try again for most of a minute. So the cache is asked first, without the network, and
the network only once its host has answered.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

from upcycle_bench.util.errors import UserError, one_line

PATIENCE = 4.0  # seconds for a host to answer
T = TypeVar("T")


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Let huggingface_hub and transformers use their cache alone in the block."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def is_offline() -> bool:
    """Whether Hugging Face's libraries use their cache alone now."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def tokenizer_of(name: str, config: Mapping[str, Any]) -> Any:
    """open_clip's tokenizer of the model called `name`, after what its text tower needs from Hugging Face is there.

    Raises UserError, which names the repository and the command that fetches it.
    """
    import open_clip

    text = config["text_cfg"]
    if tower := text.get("hf_model_name"):
        from_repository(tower, f"the configuration of {name}'s text tower", lambda: _load_config(tower))
    if not (repository := text.get("hf_tokenizer_name")):
        return open_clip.get_tokenizer(name)
    return from_repository(repository, f"the tokenizer of {name}", lambda: open_clip.get_tokenizer(name))


def from_repository(repository: str, what: str, load: Callable[[], T], otherwise: str = "") -> T:
    """What `load` makes of files of a Hugging Face repository; UserError where they are neither cached nor reached.

    `otherwise`: what else a user may do.
    """
    from huggingface_hub import constants

    remedy = f"run `hf download {repository}` where there is a network, and copy {constants.HF_HUB_CACHE} from there"
    try:
        with offline():
            return _needing_packages(what, load)
    except OSError:  # the libraries' errors for what is not cached are of this kind
        pass
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else unreachable(constants.ENDPOINT)
    return _from_network(what, why, remedy + otherwise, load)


def from_url(url: str, what: str, load: Callable[[], T]) -> T:
    """What `load` fetches from that address; UserError where it cannot be reached."""
    return _from_network(what, unreachable(url), f"download {url} where there is a network, and give the file", load)


def unreachable(url: str) -> str | None:
    """Why nobody answers at that address, or at the proxy on the way to it; None if somebody does."""
    target = urlsplit(url)
    host = target.hostname or ""
    proxy = urllib.request.getproxies().get(target.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        target = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    where = target.hostname or host, target.port or (80 if target.scheme == "http" else 443)
    found = [f"no answer within {PATIENCE:g} seconds"]

    def knock() -> None:
        try:
            socket.create_connection(where, timeout=PATIENCE).close()
            found.append("")
        except OSError as error:
            found.append(error.strerror or str(error))

    thread = threading.Thread(target=knock, daemon=True)  # looking up a name has no time-out of its own
    thread.start()
    thread.join(PATIENCE)
    return f"{where[0]}: {found[-1]}" if found[-1] else None


def _from_network(what: str, why: str | None, remedy: str, load: Callable[[], T]) -> T:
    if why is None:
        try:
            return _needing_packages(what, load)
        except UserError:
            raise
        except Exception as error:  # of urllib, huggingface_hub, transformers and open_clip, each with its own
            why = one_line(error)
    raise UserError(f"cannot fetch {what} ({why}): {remedy}.")


def _needing_packages(what: str, load: Callable[[], T]) -> T:
    """`load()`; UserError for a package that it needs and that is not installed."""
    try:
        return load()
    except (ImportError, ValueError) as error:  # transformers has ValueErrors for a tokenizer's package
        remedy = "pip install transformers sentencepiece"
        raise UserError(f"{what} cannot be loaded ({one_line(error)}); it may need a package: {remedy}.") from None


def _load_config(repository: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(repository)


def is_cached(url: str) -> bool:
    """Whether open_clip has fetched that file before."""
    return os.path.isfile(os.path.join(os.path.expanduser("~/.cache/clip"), os.path.basename(url)))
