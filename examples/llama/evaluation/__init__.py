"""Answers, their scores, and lm-evaluation-harness."""
