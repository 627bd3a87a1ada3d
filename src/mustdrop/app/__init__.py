"""`mustdrop app`: ask about a picture or a video in a browser, with all vision tokens and with some of them."""
