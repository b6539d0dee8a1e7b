"""The release's files as bytes: pickles that are scanned and framed, never unpickled."""
