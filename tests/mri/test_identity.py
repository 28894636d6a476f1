"""Identities of slices."""

import hashlib

from brainray.mri.identity import content_hash, sample_id


def test_ids_follow_from_the_bytes() -> None:
    digest = content_hash(b"abc")
    assert digest == hashlib.sha256(b"abc").hexdigest()
    assert sample_id(digest) == digest[:32]
    frames = [sample_id(digest, frame) for frame in ("", "1", "2")]
    assert len(set(frames)) == 3
    assert {len(identity) for identity in frames} == {32}
    # Saved stores and labels name slices so: by another rule they would not be found again.
    assert frames[1] == hashlib.sha256(f"{digest}#1".encode()).hexdigest()[:32]
