"""The documents as a site, and as programs: pages, links, blocks of code, commands, the notebook."""
