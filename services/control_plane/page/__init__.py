"""The web page of the service: its built files, which `make page` makes of the sources in the folder `page`."""
