# SPDX-License-Identifier: Apache-2.0
"""Small models that show what each mechanism is worth: variants, training, measures, tables."""
