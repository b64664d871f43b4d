"""Clean features over HTTP, from a compiled model: python feature_server.py MODEL [PORT] [NEURONS]

curl --data-binary @photo.jpg localhost:8000 answers {"shape": [C, h, w], "features": [...]}.
"""

import io
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import timm
import torch
from PIL import Image
from torch import Tensor

import testreg
from testreg.io.preprocessing import transform_for


class Features:
    """Photographs to feature maps (C, h, w). A patched model is one graph, and threads do not meet in it."""

    def __init__(self, name: str, neurons: str | None = None, backend: str = "inductor") -> None:
        self.model = testreg.patch(timm.create_model(name, pretrained=True).eval(), neurons)
        self.transform = transform_for(self.model)
        self.forward = torch.compile(self.model.forward_features, fullgraph=True, backend=backend)

    @torch.inference_mode()
    def __call__(self, photo: bytes) -> Tensor:
        images = self.transform(Image.open(io.BytesIO(photo)).convert("RGB")).unsqueeze(0)
        patches = self.forward(images)[:, self.model.num_prefix_tokens :]  # the register has been taken off already
        return patches[0].T.unflatten(-1, self.model.patch_embed.dynamic_feat_size(images.shape[-2:]))


def serve(features: Features, port: int = 8000) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found = features(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"shape": found.shape, "features": found.flatten().tolist()}).encode())

    return ThreadingHTTPServer(("localhost", port), Handler)


def main(name: str, port: str = "8000", neurons: str | None = None) -> None:
    serve(Features(name, neurons), int(port)).serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
