"""Photographs and labels: published layouts, the dataset store, sample order, augmentation."""
