"""Where the bytes of images are kept: a folder or an S3 bucket."""
