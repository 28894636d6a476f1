"""Options for tests of decoding: small limits, so that small files reach them."""

from brainray.mri.slices import DecodeOptions

OPTIONS = DecodeOptions(
    min_side=16,
    max_pixels=1_000_000,
    max_voxels=4_000_000,
    axis="axial",
    window_percentiles=(0.5, 99.5),
    min_foreground=0.05,
    salt=b"a secret",
)
