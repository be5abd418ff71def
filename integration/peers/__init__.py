"""`make bench-peers`: Elgate beside SQLite, PostgreSQL, Redis and RocksDB on the same disk in the same run."""
