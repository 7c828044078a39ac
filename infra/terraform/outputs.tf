output "store" {
  description = "LATENTLOOM_STORE of the settings in infra/kuberay."
  value       = "s3://${aws_s3_bucket.data.id}"
}

output "role_arn" {
  description = "For the annotation of the service account (EKS) or AWS_ROLE_ARN (GKE)."
  value       = aws_iam_role.jobs.arn
}
