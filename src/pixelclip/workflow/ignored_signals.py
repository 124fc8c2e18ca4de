"""Imported by the server that forks worker processes, and by nothing else: a signal to all processes must not end it."""

import signal

for _number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(_number, signal.SIG_IGN)
