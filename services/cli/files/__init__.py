"""Commands about data: uploading files, and looking at a file before the upload."""
