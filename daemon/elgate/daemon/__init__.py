"""Elgate's daemon: configuration, supervision of the native engine, and the command line.

The data path is not here: the engine (libelgate_core.so) runs it on native threads that never take the GIL.
"""
