"""Conceptual 12M: about 11 million pictures of the web that were still to be had, with their alt texts.

Get the tars cc12m-train-0000.tar to cc12m-train-2175.tar of https://huggingface.co/datasets/pixparse/cc12m-wds, or have
img2dataset download the pictures of https://github.com/google-research-datasets/conceptual-12m (output_format
webdataset). About 5,000 pictures a tar in the former. Licence: the list of addresses and texts may be used for any
purpose, Google LLC likes to be named; the pictures belong to their owners.

    *.tar    KEY.jpg (or png, webp)    KEY.txt    KEY.json; any number of tars

The alt texts come as they are, <PERSON> in the place of names included.
"""

from functools import partial

from mdit.sources import webdataset

HOW = "get them from https://huggingface.co/datasets/pixparse/cc12m-wds"

open_pictures = partial(webdataset.open_pictures, how=HOW)
