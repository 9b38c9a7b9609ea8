"""Evaluation: metrics with one definition each, what a figure depends on, and reports people can read.

The protocol of registry kind `metric` is in `vistok.evaluate.metric`.
"""
