"""An HTTP classifier that batches requests: `pip install litserve && python deploy/litserve_app.py`."""

from typing import Any

import litserve as ls
import torch
from fastapi import HTTPException

from moevision.data.images import BadImageError, safe_open
from moevision.data.transforms import normalize, square_pixels
from moevision.models.io import load_model


class Classifier(ls.LitAPI):
    """`POST /predict` with an image file in the field `image`; answers its class and probability."""

    def setup(self, device: str) -> None:
        """Load the model once for each worker."""
        self.model = load_model("runs/pets")
        self.model.net.to(device)
        self.device = device

    def decode_request(self, request: Any) -> torch.Tensor:
        """uint8 [3, S, S]; a file that is no image is answered with 400."""
        try:
            image = safe_open(request["image"].file, self.model.image_size)
        except BadImageError as error:
            raise HTTPException(400, error.reason) from error
        return torch.from_numpy(
            square_pixels(image, self.model.image_size, self.model.framing)
        ).permute(2, 0, 1)

    def batch(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """[B, 3, S, S]."""
        return torch.stack(inputs)

    @torch.inference_mode()
    def predict(self, pixels: torch.Tensor) -> torch.Tensor:
        """Calibrated probabilities [B, C]."""
        images = normalize(pixels, self.model.mean, self.model.std).to(self.device)
        return (self.model.net(images) / (self.model.temperature or 1)).softmax(-1)

    def unbatch(self, output: torch.Tensor) -> list[torch.Tensor]:
        """One row for each request."""
        return list(output)

    def encode_response(self, shares: torch.Tensor) -> dict[str, str | float]:
        """The likeliest class."""
        best = int(shares.argmax())
        return {"class": self.model.class_names[best], "probability": float(shares[best])}


if __name__ == "__main__":
    ls.LitServer(Classifier(max_batch_size=32, batch_timeout=0.005)).run(port=8000)
