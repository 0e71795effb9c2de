"""Export: a run as two folders. What transformers makes of them: test_data_tokenizer_real.py."""

import pytest

import model
from tools import export


def test_what_export_refuses(tmp_path):
    with pytest.raises(model.UserError, match="give a run and a new folder"):
        export.main(["RUN"])
    with pytest.raises(model.UserError, match="nowhere is neither a run folder"):
        export.main(["nowhere", str(tmp_path / "out")])
    model.write_json(tmp_path / "run" / "config.json", {"model": {}})
    with pytest.raises(model.UserError, match="is not empty: choose a new folder"):
        export.main([str(tmp_path / "run"), str(tmp_path)])
