"""Open questions about videos: TGIF-QA, MSVD-QA, MSRVTT-QA and ActivityNet-QA, in the files of Video-LLaVA's guide.

Papers let GPT-3.5 judge these answers. That needs a paid service whose models change, so the score here is another one:
exact match and soft accuracy after VQA normalisation. The answer file is what the judging script reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from mustdrop.eval.benchmark import Answer, Benchmark, Item, Source, percent, write_jsonl
from mustdrop.eval.data_files import Folder
from mustdrop.eval.media import VIDEO_ENDINGS, Clip
from mustdrop.eval.vqa import normalise


class VideoQA(Benchmark):
    """Questions and truths in two lists of the same order, videos in a folder."""

    section = "evaluation"
    guide = "https://github.com/PKU-YuanGroup/Video-LLaVA/blob/main/TRAIN_AND_VALIDATE.md"
    max_new_tokens = 1024
    headline = "exact"
    metric = "exact match after VQA normalisation: not the judgement by GPT that papers report"
    files_only = "reads Video-LLaVA's files (--data DIR), not a data set of `datasets`."
    videos: ClassVar[tuple[str, ...]] = ("videos",)
    prefix: ClassVar[str] = ""

    def file_items(self, source: Source, folder: Folder) -> list[Item]:
        """From `test_q.json`, `test_a.json` and the folder of videos."""
        path = folder.find("test_q.json", what="questions")
        truths_path = folder.find("test_a.json", what="truths")
        videos = folder.find(*self.videos, folder=True, what="videos")
        rows = folder.json(path, list)
        truths = folder.json(truths_path, list)
        by_id = {row["question_id"]: row for row in truths if isinstance(row, dict) and "question_id" in row}
        found = []
        for place, row in enumerate(rows):
            if not isinstance(row, dict) or not {"video_name", "question", "question_id"} <= set(row):
                folder.reject(f"{path.name} entry {place + 1}", "no video_name, question or question_id")
                continue
            truth = by_id.get(row["question_id"]) or (truths[place] if place < len(truths) and not by_id else None)
            if not isinstance(truth, dict) or "answer" not in truth:
                reason = f"{truths_path.name} has no answer to this question"
                folder.reject(row["question_id"], reason)
                continue
            clip = Clip(self._video(videos, str(row["video_name"])), source.frames)
            found.append(Item(row["question_id"], row["question"], clip, row["question"], str(truth["answer"])))
        return found

    def _video(self, folder: Path, name: str) -> Path:
        """The file of a video, or a folder of its frames; a path that does not exist if there is neither."""
        names = [f"{self.prefix}{name}{ending}" for ending in ("", *VIDEO_ENDINGS)]
        return next((folder / one for one in names if (folder / one).exists()), folder / names[1])

    def credit(self, answer: Answer) -> float:
        """Whether the answer is the expected one."""
        return float(not answer.failed and normalise(answer.text) == normalise(answer.item.truth))

    def scores(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Exact match, and how many answers have the expected words inside."""
        inside = [
            not answer.failed and f" {normalise(answer.item.truth)} " in f" {normalise(answer.text)} "
            for answer in answers
        ]
        return {
            "exact": percent([self.credit(answer) for answer in answers]),
            "contains": percent([float(value) for value in inside]),
        }

    def write(self, answers: Sequence[Answer], out: Path, model: str) -> list[Path]:
        """What Video-LLaVA's judging script reads: one object per line."""
        rows = [
            {
                "id": answer.item.id,
                "question": answer.item.text,
                "answer": answer.item.truth,
                "pred": answer.text,
            }
            for answer in answers
        ]
        return [write_jsonl(out / "merge.jsonl", rows)]


class TGIF(VideoQA):
    """TGIF-QA (arXiv 1704.04497), frame questions."""

    name = "tgif"
    title = "TGIF-QA"
    folder = "GPT_Zero_Shot_QA/TGIF_Zero_Shot_QA"
    videos = ("mp4", "videos")


class MSVD(VideoQA):
    """MSVD-QA."""

    name = "msvd"
    title = "MSVD-QA"
    folder = "GPT_Zero_Shot_QA/MSVD_Zero_Shot_QA"


class MSRVTT(VideoQA):
    """MSRVTT-QA."""

    name = "msrvtt"
    title = "MSRVTT-QA"
    folder = "GPT_Zero_Shot_QA/MSRVTT_Zero_Shot_QA"
    videos = ("videos/all", "videos")


class ActivityNet(VideoQA):
    """ActivityNet-QA (arXiv 1906.02467)."""

    name = "activitynet"
    title = "ActivityNet-QA"
    folder = "GPT_Zero_Shot_QA/Activitynet_Zero_Shot_QA"
    videos = ("all_test", "videos")
    prefix = "v_"
