# The bucket of a latentloom installation, and the role its pods take. Nothing here has a key.

resource "aws_s3_bucket" "data" {
  bucket = var.bucket

  lifecycle {
    prevent_destroy = true
  }
}

resource "aws_s3_bucket_ownership_controls" "data" {
  bucket = aws_s3_bucket.data.id

  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

resource "aws_s3_bucket_public_access_block" "data" {
  bucket = aws_s3_bucket.data.id

  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_server_side_encryption_configuration" "data" {
  bucket = aws_s3_bucket.data.id

  rule {
    bucket_key_enabled = true

    apply_server_side_encryption_by_default {
      sse_algorithm = "aws:kms"
    }
  }
}

resource "aws_s3_bucket_versioning" "data" {
  bucket = aws_s3_bucket.data.id

  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "data" {
  bucket     = aws_s3_bucket.data.id
  depends_on = [aws_s3_bucket_versioning.data]

  rule {
    id     = "abort-incomplete-uploads"
    status = "Enabled"

    filter {}

    abort_incomplete_multipart_upload {
      days_after_initiation = 3
    }
  }

  rule {
    id     = "expire-noncurrent"
    status = "Enabled"

    filter {}

    noncurrent_version_expiration {
      noncurrent_days = var.noncurrent_days
    }

    expiration {
      expired_object_delete_marker = true
    }
  }
}

# A ledger record is created only if it is absent: a client that forgets the condition is refused by the store itself.
data "aws_iam_policy_document" "bucket" {
  statement {
    sid       = "LedgerOnlyByConditionalWrite"
    effect    = "Deny"
    actions   = ["s3:PutObject"]
    resources = [for pattern in var.ledger_patterns : "${aws_s3_bucket.data.arn}/${pattern}"]

    principals {
      type        = "*"
      identifiers = ["*"]
    }

    condition {
      test     = "Null"
      variable = "s3:if-none-match"
      values   = ["true"]
    }
  }

  statement {
    sid       = "OnlyEncryptedConnections"
    effect    = "Deny"
    actions   = ["s3:*"]
    resources = [aws_s3_bucket.data.arn, "${aws_s3_bucket.data.arn}/*"]

    principals {
      type        = "*"
      identifiers = ["*"]
    }

    condition {
      test     = "Bool"
      variable = "aws:SecureTransport"
      values   = ["false"]
    }
  }
}

resource "aws_s3_bucket_policy" "data" {
  bucket     = aws_s3_bucket.data.id
  policy     = data.aws_iam_policy_document.bucket.json
  depends_on = [aws_s3_bucket_public_access_block.data]
}

# Pods present their service account's token; the cluster's issuer vouches for it. Heads and workers have a role each.
data "aws_iam_policy_document" "trust" {
  for_each = var.service_accounts

  dynamic "statement" {
    for_each = var.oidc_issuers

    content {
      effect  = "Allow"
      actions = ["sts:AssumeRoleWithWebIdentity"]

      principals {
        type        = "Federated"
        identifiers = [statement.value]
      }

      condition {
        test     = "StringEquals"
        variable = "${statement.key}:sub"
        values   = ["system:serviceaccount:${each.value}"]
      }

      condition {
        test     = "StringEquals"
        variable = "${statement.key}:aud"
        values   = ["sts.amazonaws.com"]
      }
    }
  }
}

data "aws_iam_policy_document" "access" {
  for_each = var.service_accounts

  statement {
    sid       = "List"
    effect    = "Allow"
    actions   = ["s3:ListBucket", "s3:ListBucketMultipartUploads", "s3:GetBucketLocation"]
    resources = [aws_s3_bucket.data.arn]
  }

  statement {
    sid       = "ReadWrite"
    effect    = "Allow"
    actions   = ["s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
    resources = ["${aws_s3_bucket.data.arn}/*"]
  }

  # Drivers collect garbage; a worker removes old checkpoints of a training, and nothing else.
  statement {
    sid       = "Delete"
    effect    = "Allow"
    actions   = ["s3:DeleteObject"]
    resources = [for pattern in var.deletable_patterns[each.key] : "${aws_s3_bucket.data.arn}/${pattern}"]
  }

  # Jobs read images and codecs; whoever brings them has another role.
  statement {
    sid       = "SourcesStay"
    effect    = "Deny"
    actions   = ["s3:PutObject", "s3:DeleteObject"]
    resources = [for prefix in var.source_prefixes : "${aws_s3_bucket.data.arn}/${prefix}/*"]
  }

  # Old versions are what a mistake is undone with: jobs cannot remove them.
  statement {
    sid       = "KeepVersions"
    effect    = "Deny"
    actions   = ["s3:DeleteObjectVersion", "s3:PutBucketVersioning", "s3:PutLifecycleConfiguration"]
    resources = [aws_s3_bucket.data.arn, "${aws_s3_bucket.data.arn}/*"]
  }
}

resource "aws_iam_role" "jobs" {
  for_each = var.service_accounts

  name                 = "latentloom-${each.key}"
  assume_role_policy   = data.aws_iam_policy_document.trust[each.key].json
  max_session_duration = 43200
}

resource "aws_iam_role_policy" "jobs" {
  for_each = var.service_accounts

  name   = "bucket"
  role   = aws_iam_role.jobs[each.key].id
  policy = data.aws_iam_policy_document.access[each.key].json
}

# A way to buckets of this region beside the NAT gateway, which bills every byte.
data "aws_region" "current" {}

resource "aws_vpc_endpoint" "store" {
  count = length(var.route_table_ids) > 0 ? 1 : 0

  vpc_id            = var.vpc_id
  service_name      = "com.amazonaws.${data.aws_region.current.region}.s3"
  vpc_endpoint_type = "Gateway"
  route_table_ids   = var.route_table_ids
}
