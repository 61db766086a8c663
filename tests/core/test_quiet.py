"""Notices that are not for our users are dropped; everything else that the same libraries say stays."""

from __future__ import annotations

import logging

import pytest

from distill.core.quiet import NOTICES, quiet_torchao


def test_the_notices_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    loggers = [logging.getLogger(name) for name in NOTICES]
    before = [[*logger.filters] for logger in loggers]
    try:
        quiet_torchao()
        for logger in loggers:
            logger.warning("%s is an Enum subclass and is now natively supported by torch.compile as an opaque", "X")
            logger.warning("Failed to load /x/_C_mxfp8.so: Could not load this library: /x/_C_mxfp8.so")
            logger.warning("the disk is on fire")
    finally:
        for logger, filters in zip(loggers, before, strict=True):
            logger.filters = filters
    said = [(record.name, record.getMessage()[:14]) for record in caplog.records]
    assert said == [
        ("torch.utils._pytree", "Failed to load"),
        ("torch.utils._pytree", "the disk is on"),
        ("torchao", "X is an Enum s"),
        ("torchao", "the disk is on"),
    ]
