"""The web page of the service, as built files. `make page` builds them from the sources in the folder `page`."""
