from __future__ import annotations

import pytest

from kontext_batch.errors import StepError
from kontext_batch.operations.encoding import FORMATS
from kontext_batch.operations.pictures import BadPicture, probe
from kontext_batch.operations.registry import OPERATION_VERSIONS, PillowOperations
from kontext_batch.planning import params as planning
from kontext_batch.ports import Operations, Probe
from kontext_batch.recipes.schema import EXTENSIONS as RECIPE_EXTENSIONS
from kontext_batch.storage.keys import EXTENSIONS as KEY_EXTENSIONS
from tests.unit.operations.making import RED, decoded, encoded, loaded, plain


def test_versions_are_those_that_planning_puts_into_keys() -> None:
    operations = {name: version for name, version in planning.VERSIONS.items() if name not in planning.SAMPLING}

    assert operations == dict(OPERATION_VERSIONS)


def test_formats_are_named_alike_everywhere() -> None:
    assert {name: each.extension for name, each in FORMATS.items()} == dict(RECIPE_EXTENSIONS)
    assert all(KEY_EXTENSIONS[each.media_type] == each.extension for each in FORMATS.values())
    assert set(planning.DEFAULT_QUALITY) == set(FORMATS)
    assert {name for name, quality in planning.DEFAULT_QUALITY.items() if quality is None} == {
        name for name, each in FORMATS.items() if not each.has_quality
    }


def test_operations_run_by_name() -> None:
    operations: Operations = PillowOperations(max_pixels=120)
    size, image = {"width": 8, "height": 6}, plain((9, 9), RED)
    finish = {"size": size, "fit": "crop", "background": "#FFFFFF", "format": "png"}
    sheet = {"columns": 1, "cell": size, "labels": [None], "background": "#FFFFFF", "format": "png"}

    assert decoded(operations.run("finish", finish, [loaded(image)]).data).size == (8, 6)
    assert decoded(operations.run("contact_sheet", sheet, [loaded(image, "cell")]).data).size == (12, 10)
    with pytest.raises(BadPicture, match=r"11x11 is more than the 0.00012 million pixels"):
        operations.run("finish", finish, [loaded(plain((11, 11), RED))])
    with pytest.raises(StepError, match="unknown operation 'sharpen'; known: finish, contact_sheet"):
        operations.run("sharpen", {}, [])


def test_probe_is_the_port() -> None:
    port: Probe = probe

    assert port(encoded(plain((9, 8), RED))) == ("PNG", 9, 8)
