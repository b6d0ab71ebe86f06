"""A live page over journals: read-only, without PyTorch, for any number of runs and viewers.

``journal -> columns, events, findings -> course -> library -> api -> page``. Only `kalmanguard.dashboard.api` and what
stands above it need the extra ``dashboard`` (Starlette and Uvicorn).
"""
