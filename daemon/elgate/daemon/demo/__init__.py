"""`elgate demo`: an ordinary program (orders.py), run natively and through Elgate, and then under SIGKILL."""
