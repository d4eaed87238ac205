"""What a student has cost, in tokens: exact, the same after any kill, and independent of the machine."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Cost"]


@dataclass(frozen=True)
class Cost:
    """Real tokens (never padding) that went through the models to make a student; measuring held-out text is left out.

    ``teacher_forward_tokens``: read by the teachers to say something about them, summed over the teachers. Answers that
    come from a cache count once for each text, whichever run filled it. ``teacher_generated_tokens``: written by the
    teachers (a mixture of several writes a token once). ``student_forward_tokens``: read by the student, in training
    (``tokens_seen``) and as prompts of texts that it wrote. ``student_generated_tokens``: written by the student.
    """

    teacher_forward_tokens: int = 0
    teacher_generated_tokens: int = 0
    student_forward_tokens: int = 0
    student_generated_tokens: int = 0
