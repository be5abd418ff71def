"""`elgate bench`: every figure beside the physical limit or the native way, taken in the same run."""
