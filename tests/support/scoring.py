"""What scoring runs, counted."""

import pytest

from prefalign import models


@pytest.fixture
def passes(monkeypatch):
    """The number of responses in each forward pass that scores some."""
    laid = []
    real = models.pack_parts

    def watched(groups, *args, **kwargs):
        laid.append(sum(len(group.response_ids) for group in groups))
        return real(groups, *args, **kwargs)

    monkeypatch.setattr(models, "pack_parts", watched)
    return laid
