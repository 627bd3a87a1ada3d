"""Results of evaluations side by side: `mustdrop report`."""

from mustdrop.eval.report.files import collect, group_files
from mustdrop.eval.report.groups import Average, Group, Row, averages, group

__all__ = ["Average", "Group", "Row", "averages", "collect", "group", "group_files"]
