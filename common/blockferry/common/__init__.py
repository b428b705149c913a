"""blockferry shared by both sites: volumes, formats, and what carries them."""
