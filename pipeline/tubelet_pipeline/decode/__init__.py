"""Video files to exact frames, each decoded in a child process that can be killed.

    DecodeRequest ─▶ pool (threads) ─▶ child process ─▶ memfd ─▶ DecodedClip
                                       source ─▶ probe ─▶ policy ─▶ pyav | decord | torchcodec

This file imports nothing: a child imports only what it decodes with, and starts fast.
"""
