"""Exact frames from video files, decoded in child processes that can be killed.

    DecodeRequest ─▶ pool (threads) ─▶ process_main (child process) ─▶ memfd ─▶ DecodedClip
                                       local path ─▶ video_index ─▶ decoders: pyav | decord | torchcodec

This file imports nothing, so that a child process imports only what it needs, and starts fast.
"""
