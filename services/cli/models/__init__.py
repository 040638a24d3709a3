"""Commands about models: listing, downloading, deploying, asking and scoring with them."""
