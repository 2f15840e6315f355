"""A scoring service on this machine, and a tiny CLIP, for the tests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ENDS = ("<|startoftext|>", "<|endoftext|>")
WORDS = {word: i for i, word in enumerate([*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *ENDS])}
SIDE, WIDTH = 16, 24


class ScoringServer:
    """Serves while it is entered. Answers by `behave(body, headers) -> (status, body)`, which may be replaced."""

    def __init__(self) -> None:
        self.behave: Callable[[bytes, dict[str, str]], tuple[int, bytes]] = lambda body, headers: (404, b"")
        self.asked = 0
        handle = self._handle

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                handle(self)

            def log_message(self, *_: object) -> None:
                pass

        class Http(ThreadingHTTPServer):
            request_queue_size = 128  # of 5, connections would be refused

            def handle_error(self, *_: object) -> None:
                """A client that is gone is no news: its line would come out in another test."""

        self._http = Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> ScoringServer:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers["Content-Length"]))
        self.asked += 1
        status, reply = self.behave(body, {name.lower(): value for name, value in request.headers.items()})
        request.send_response(status)
        request.send_header("Content-Length", str(len(reply)))
        request.end_headers()
        request.wfile.write(reply)


def save_clip(folder: Path) -> None:
    """In transformers' layout. Weights are far from the small ones of a fresh model, whose scores are nearly equal."""
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = text | {"hidden_size": 48, "num_attention_heads": 3, "image_size": SIDE, "patch_size": 4}
    text |= {"vocab_size": len(WORDS), "eos_token_id": 2, "bos_token_id": 0, "max_position_embeddings": 20}
    both = {"hidden_act": "gelu"}
    config = CLIPConfig(text_config=text | both, vision_config=vision | both, projection_dim=WIDTH)
    torch.manual_seed(0)
    model = CLIPModel(config)
    with torch.no_grad():
        for x in model.parameters():
            x += 0.1 * torch.randn(x.shape)
    model.save_pretrained(folder)
    CLIPTokenizer(vocab=WORDS, merges=[]).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)
