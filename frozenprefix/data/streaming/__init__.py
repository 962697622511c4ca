"""Training data that stays on disk: samples are read from shards in the step that needs them.

| module | holds |
|---|---|
| `groups` | images by number, from shards or from lists, and the training set of several sources |
| `index`, `tars` | WebDataset tars: where each sample is, and reading it |
| `tables` | parquet and arrow files |
| `features` | features that shards hold in place of images |
| `build`, `page` | writing shards, and a page of random samples |
"""
