"""A checkpoint as one plain module, for those who load it without brainray."""

from torch import Tensor, nn

from brainray.engine.state import Checkpoint


class SliceClassifier(nn.Module):
    """Preprocessed slices (B, 1, S, S) of grey values 0..255, float32, to the probabilities (B, C)
    of the classes; S is the side that the encoder was trained at.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.encoder = checkpoint.encoder.eval()
        self.mean = 255 * checkpoint.scale.mean
        self.std = 255 * checkpoint.scale.std

    def forward(self, images: Tensor) -> Tensor:
        features = self.encoder.backbone((images - self.mean) / self.std)
        probabilities: Tensor = self.encoder.head(features).softmax(dim=1)
        return probabilities
