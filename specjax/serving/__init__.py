"""Serving: continuous batching with speculation, and an OpenAI-compatible server.

`requests` says what goes in and what comes out, `engine` decodes, `server` speaks HTTP.
"""
